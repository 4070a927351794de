"""The paper's published numbers, and their values by its own definitions and by this study's runs."""
