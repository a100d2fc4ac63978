"""From paths to decoded images: listings, reader processes and packed images."""
