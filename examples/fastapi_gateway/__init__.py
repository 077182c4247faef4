"""A small tool gateway on FastAPI that keeps its records with agent-gateway-store."""
