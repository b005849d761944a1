"""Ways of getting visual tokens of a clip: what a row of the table is (`row`), the rows of the field's methods
(`compared`), their table beside ours and its picture (`field`, `picture`), and what their papers claim (`claims`).
`settings` makes those of our two methods from what a command was asked for."""
