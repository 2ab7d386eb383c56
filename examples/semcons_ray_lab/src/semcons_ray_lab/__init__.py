"""Parts for semcons_ray: a rule, an algorithm and a metric, each in a file of its own."""
