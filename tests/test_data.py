"""The records that travel with the package are the published ones."""

import pytest
import torch

from pyjlode.data import hare_lynx, hudson_bay

# Year, hare, lynx in thousands of pelts: hudson-bay-lynx-hare.csv of Carpenter, Predator-prey population dynamics: the
# Lotka-Volterra model in Stan, 2018 (github.com/stan-dev/example-models, knitr/lotka-volterra), which has them from
# Howard, Modeling Basics, 2009. The first and the last year, the peaks and the troughs of both.
PUBLISHED = [
    (1900, 30.0, 4.0),
    (1903, 77.4, 35.2),
    (1904, 36.3, 59.4),
    (1906, 18.1, 19.0),
    (1910, 27.1, 7.4),
    (1913, 76.6, 19.5),
    (1915, 19.5, 51.1),
    (1917, 7.6, 15.8),
    (1920, 24.7, 8.6),
]


def test_hudson_bay_has_every_year_from_1900_to_1920():
    years, pelts = hudson_bay()
    assert years.tolist() == list(range(1900, 1921))
    assert pelts.shape == (21, 2)
    assert years.dtype == pelts.dtype == torch.float64
    assert bool((pelts > 0).all())


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: str(row[0]))
def test_hudson_bay_has_the_published_figures(row):
    years, pelts = hudson_bay()
    year, *counts = row
    assert pelts[years == year].tolist() == [counts]


def test_hudson_bay_sums_to_the_published_totals():
    # Sums of the 21 rows of the published table: no row between those above was mistyped.
    _, pelts = hudson_bay()
    assert pelts.sum(0).tolist() == pytest.approx([715.7, 423.5], abs=1e-9)


# The first and the last year, and peaks and troughs of both.
LONG = [
    (1845, 19.58, 30.09),
    (1863, 152.65, 14.33),
    (1862, 2.18, 4.09),
    (1886, 134.86, 79.35),
    (1899, 2.3, 8.86),
    (1919, 11.21, 3.19),
    (1928, 1.8, 37.7),
    (1935, 15.76, 35.4),
]


def test_hare_lynx_is_the_published_record():
    years, pelts = hare_lynx()
    assert years.tolist() == list(range(1845, 1936))
    assert (pelts.shape, years.dtype, pelts.dtype) == ((91, 2), torch.float64, torch.float64)
    for year, *counts in LONG:
        assert pelts[years == year].tolist() == [counts]
    assert pelts.sum(0).tolist() == pytest.approx([4131.99, 2578.63], abs=1e-9)


def test_each_call_gives_tensors_of_its_own():
    hudson_bay()[1].zero_()
    assert float(hudson_bay()[1].sum()) > 0
