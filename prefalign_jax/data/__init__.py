"""From files of preferences to packed batches."""
