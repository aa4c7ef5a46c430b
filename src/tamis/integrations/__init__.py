"""Ways for models to run their attention through tamis; each module is imported by name."""
