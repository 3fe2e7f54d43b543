"""A Hugging Face model: its configuration, loading, adapters, shape and device."""
