"""What is wrong or odd in a folder of images, before a run finds it out."""
