"""The server's HTTP side: its process, endpoints, and streamed answers."""
