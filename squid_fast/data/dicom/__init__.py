"""DICOM: ``reader`` opens a file, ``stored`` takes its first frame, ``grey`` makes it an image."""
