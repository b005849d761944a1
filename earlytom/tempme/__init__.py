"""TempMe as pure functions: how many tokens are merged where (`schedule`), one block around a merge (`block`), and the
published video path of a CLIP encoder with trained weights (`clip`). One merge step is `earlytom.bipartite`;
`earlytom.methods.published.tempme` is what of the method needs no training."""
