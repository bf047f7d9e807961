"""HTTP: what a request passes on its way in, how it is answered, and how the process serves and ends."""
