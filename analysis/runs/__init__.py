"""Reading runs from MLflow into typed, tidy frames."""
