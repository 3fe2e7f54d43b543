"""A Hugging Face model: its configuration, loading, shape and device."""
