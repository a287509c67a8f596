"""A fragment's way from a store into weights: `fragment_pipeline` is the table of contents."""
