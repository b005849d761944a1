"""What an engine is: its graphs and tensors, its counts, its files."""
