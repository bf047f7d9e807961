"""Who uses the service: keys, and fairness between them."""
