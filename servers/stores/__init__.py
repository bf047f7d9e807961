"""State that a server keeps for its clients between requests, in fair shares of budgets of bytes."""
