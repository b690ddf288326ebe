"""The page in the browser: forms of the sampling scripts' flags, a queue of jobs, a gallery."""
