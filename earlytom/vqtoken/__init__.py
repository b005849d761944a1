"""VQToken as pure functions: a codebook of a video's tokens by seeded k-means (`codebook`), and attention over it with
trained weights (`attention`). `earlytom.methods.published.vqtoken` is the part that needs no training."""
