"""One client's requests: admission, streams, the handler, handing outputs on."""
