"""The paper's published numbers, and what its own definitions and this study's runs make of each."""
