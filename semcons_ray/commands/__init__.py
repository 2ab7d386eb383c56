"""The `semcons` command: its subcommands, and its output in the terminal."""
