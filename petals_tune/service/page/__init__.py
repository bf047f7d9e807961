"""The pages of the service: static files, without a build step and without anything from elsewhere."""
