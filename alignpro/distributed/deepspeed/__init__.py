"""DeepSpeed's configuration, and the extensions that it compiles."""
