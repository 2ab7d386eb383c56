"""Parts for semcons_ray: a rule, an algorithm, a metric and a kind of client, each in a file of its own."""
