"""The server: HTTP over a Unix socket (and TCP with a token), around one store."""
