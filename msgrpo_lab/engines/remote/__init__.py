"""The engine on an OpenAI-compatible server."""
