"""Serving of clients' requests: streams, admission, execution, hand-over of outputs to other servers."""
