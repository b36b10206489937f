"""What both wings agree on: addresses, bytes, checksums, configuration, messages. No I/O and no asyncio."""
