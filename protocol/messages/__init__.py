"""One noun per file: the bodies of the messages and the values inside them. `protocol.kinds` maps kind to body."""
