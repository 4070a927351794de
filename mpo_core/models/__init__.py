"""PicoGPT, and text generation."""
