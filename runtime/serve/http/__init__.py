"""How the server speaks HTTP: its process, and answers that are sent as they come."""
