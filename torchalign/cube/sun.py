"""Where the sun stands: what shadows in a frame depend on."""

from __future__ import annotations

from typing import Any

import numpy as np


def sun_position(time: Any, latitude: Any, longitude: Any) -> tuple[Any, Any]:
    """Elevation and azimuth of the sun, by the Astronomical Almanac's formulas of low precision.

    Without refraction; right to 0.03 degrees between 1950 and 2050.

    Args:
        time: ``datetime64``, UTC.
        latitude: degrees, north is positive; broadcastable.
        longitude: degrees, east is positive; broadcastable.

    Returns:
        Both in degrees: the elevation above the horizon, and the azimuth clockwise from north in [0, 360). NaN for
        NaT.

    References:
        Michalsky 1988, doi:10.1016/0038-092X(88)90045-X.

    >>> elevation, azimuth = sun_position(np.datetime64("2020-06-21T12:00"), 46.0, 0.0)
    >>> float(elevation.round()), float(azimuth.round())
    (67.0, 179.0)
    """
    time = np.asarray(time, "datetime64[s]")
    seconds = (time - np.datetime64("2000-01-01T12:00:00", "s")).astype(float)
    days = np.where(np.isnat(time), np.nan, seconds / 86400)
    mean_longitude = np.deg2rad((280.460 + 0.9856474 * days) % 360)
    anomaly = np.deg2rad((357.528 + 0.9856003 * days) % 360)
    ecliptic = mean_longitude + np.deg2rad(1.915 * np.sin(anomaly) + 0.020 * np.sin(2 * anomaly))
    obliquity = np.deg2rad(23.439 - 0.0000004 * days)
    ascension = np.arctan2(np.cos(obliquity) * np.sin(ecliptic), np.cos(ecliptic))
    declination = np.arcsin(np.sin(obliquity) * np.sin(ecliptic))
    sidereal = 15 * ((18.697374558 + 24.06570982441908 * days) % 24)  # of Greenwich, in degrees
    hour = np.deg2rad(sidereal + np.asarray(longitude, float)) - ascension  # 0 when the sun is highest
    place = np.deg2rad(np.asarray(latitude, float))
    up = np.sin(place) * np.sin(declination) + np.cos(place) * np.cos(declination) * np.cos(hour)
    east = -np.cos(declination) * np.sin(hour)
    north = np.cos(place) * np.sin(declination) - np.sin(place) * np.cos(declination) * np.cos(hour)
    elevation = np.rad2deg(np.arcsin(np.clip(up, -1, 1)))
    return elevation, np.rad2deg(np.arctan2(east, north)) % 360
