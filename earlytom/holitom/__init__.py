"""HoliTom as pure functions: segmentation (`segments`) and compression of segments (`compress`).
`earlytom.methods.published.holitom` is the method built on them; merging inside the language model is
`earlytom.inner`."""
