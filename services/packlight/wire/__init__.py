"""gRPC and protobuf at the edge: generated stubs, conversions, status mapping, servers and channels."""
