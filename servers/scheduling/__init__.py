"""What is computed when: queues, batches of steps, the computing thread."""
