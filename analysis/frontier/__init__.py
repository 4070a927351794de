"""The frontier of few parameters and good values, and how sure it is: pure functions, arrays in, arrays out."""
