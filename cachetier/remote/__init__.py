"""Stores that servers of several nodes share: Mooncake Store and S3, behind one interface."""
