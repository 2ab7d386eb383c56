"""What programs and the command line ask for: runs and studies to do, and their results. Public names are imported from
`semcons_ray` itself."""
