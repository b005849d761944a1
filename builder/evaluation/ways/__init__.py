"""Ways of getting visual tokens of a clip: what a row of the table is (`row`), the rows of the field's methods
(`compared`), and what their papers claim (`claims`). `inside` asks a decoder that leaves tokens out on its way."""
