"""What ``CacheBlend`` consists of: a class for each of its tasks, over what they share."""
