"""HoliTom as pure functions: where segments begin (`segments`), and what stays of them (`compress`).
`earlytom.methods.published.holitom` is the method made of them; what it does inside the language model is
`earlytom.inner`."""
