"""The input of the classifier for whole data sets: extracted once, cached, over several processes."""
