"""The configuration: every key, its checks, how it is composed and how it is described."""
