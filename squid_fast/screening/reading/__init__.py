"""From paths to decoded images: listings, reader processes, packed images."""
