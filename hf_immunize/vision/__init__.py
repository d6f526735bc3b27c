"""Hugging Face vision models and image data."""
