"""The `semcons` command: its words, what each does, and what people see while it works."""
