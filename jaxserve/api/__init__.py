"""The HTTP front end: the OpenAI API over an `AsyncEngine`, as one ASGI app."""
