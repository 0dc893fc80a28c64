"""Procedural people: the embedded default data set, drawn on the fly from a seed.

Users without person re-identification data can run everything on these people. Their
whole-body colour does not give identity away: there are few colours of shirts and trousers, so
that many identities share each outfit. They differ in local details (bag, shirt pattern, shoes,
hat, hair, scarf, ...), seen by cameras that differ in light, colour cast, sharpness and
background, in imperfect detection boxes.

Everything is a pure function of integers: an `Appearance` of (seed, identity), a `Camera` of
(seed, camera), an image of both and of its own `Portrait`. A new detail is a field of
`Appearance` and a few lines in one of the `_draw_...` functions.

Body units: the body is 1 high, x grows to the image's right when the person faces the camera,
y grows downwards from 0 (crown) to 1 (soles), z grows towards where the person looks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Colour: TypeAlias = tuple[int, int, int]
XY: TypeAlias = tuple[float, float]
Pair: TypeAlias = tuple[float, float]
T = TypeVar("T")

MIN_HEIGHT, MIN_WIDTH = 64, 32
SPLITS = ("train", "query", "gallery", "unlabeled")
SUPERSAMPLING = 2
_SMOOTH = Image.Resampling.BILINEAR

SHIRTS: tuple[Colour, ...] = ((52, 62, 104), (122, 124, 128), (124, 52, 56), (190, 186, 176))
TROUSERS: tuple[Colour, ...] = ((44, 44, 50), (70, 90, 128), (148, 132, 104))
SKINS: tuple[Colour, ...] = ((232, 190, 162), (196, 146, 112), (120, 82, 60))
HAIRS: tuple[Colour, ...] = ((28, 24, 24), (92, 60, 38), (206, 172, 104), (150, 148, 146))
SHOES: tuple[Colour, ...] = ((24, 24, 26), (238, 238, 236), (190, 44, 44), (120, 78, 44))
ACCENTS: tuple[Colour, ...] = (
    (242, 240, 236),
    (20, 20, 24),
    (240, 200, 40),
    (214, 44, 48),
    (44, 140, 226),
    (48, 160, 76),
    (236, 112, 176),
)

# The first numbers of the seeds, which keep the random streams apart.
_APPEARANCE, _CAMERA, _IMAGE = range(3)


@dataclass(frozen=True, slots=True)
class Portrait:
    """One image to draw: who, seen by which camera, for which split.

    Attributes:
        key: Name of the image, unique in the set, such as "train/0012_c3_000004".
        identity: The person drawn, from 1; known for every split, unlabeled too.
        camera: The camera that sees the person, from 1.
        index: Running number of the image among those of the identity, from 0.
        split: One of `SPLITS`.
    """

    key: str
    identity: int
    camera: int
    index: int
    split: str

    @property
    def pid(self) -> int | None:
        """The identity's label; None where the split has no labels."""
        return None if self.split == "unlabeled" else self.identity

    @property
    def camid(self) -> int | None:
        """The camera's label; None where the split has no labels."""
        return None if self.split == "unlabeled" else self.camera


def portraits(
    *,
    num_train_identities: int,
    num_test_identities: int,
    num_unlabeled_identities: int,
    num_cameras: int,
    images_per_camera: int,
) -> list[Portrait]:
    """Return the images of a data set, ordered by identity and index, without drawing any.

    Identities are numbered from 1: first train, then test, then unlabeled. Each is seen by 2
    to `num_cameras` cameras (in equal shares), `images_per_camera` times by each. Of a test
    identity, each camera's first image is a query and the others are gallery, so that every
    query has a match from another camera.

    Raises:
        ValueError: There are less than two cameras or images of a camera, or a number of
            identities is negative.
    """
    if min(num_train_identities, num_test_identities, num_unlabeled_identities) < 0:
        raise ValueError("the numbers of identities must not be negative")
    if num_cameras < 2:
        raise ValueError(f"matching across cameras needs num_cameras >= 2, not {num_cameras}")
    if images_per_camera < 2:
        raise ValueError(
            "a query and a gallery image of each camera need images_per_camera >= 2, "
            f"not {images_per_camera}"
        )
    first_test = 1 + num_train_identities
    first_unlabeled = first_test + num_test_identities
    drawn = []
    for identity in range(1, first_unlabeled + num_unlabeled_identities):
        times_seen = 2 + identity // num_cameras % (num_cameras - 1)
        for index in range(times_seen * images_per_camera):
            camera = 1 + (identity + index // images_per_camera) % num_cameras
            if identity < first_test:
                split = "train"
            elif identity >= first_unlabeled:
                split = "unlabeled"
            else:
                split = "gallery" if index % images_per_camera else "query"
            key = f"{split}/{identity:04d}_c{camera}_{index:06d}"
            drawn.append(Portrait(key, identity, camera, index, split))
    return drawn


def draw(portrait: Portrait, *, seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """Draw one RGB image ``[height, width, 3]``; the same arguments give the same pixels.

    Raises:
        ValueError: The size is less than 64x32, the seed negative or the split unknown.
    """
    if height < MIN_HEIGHT or width < MIN_WIDTH:
        raise ValueError(
            f"people need images of at least {MIN_HEIGHT}x{MIN_WIDTH}, not {height}x{width}"
        )
    who, where = portrait.identity, portrait.camera
    moment = (who, where, portrait.index, SPLITS.index(portrait.split))
    return render(
        Appearance.of(who, seed=seed),
        Camera.sample(np.random.default_rng((seed, _CAMERA, where))),
        np.random.default_rng((seed, _IMAGE, *moment)),
        height=height,
        width=width,
    )


@dataclass(frozen=True, slots=True)
class Appearance:
    """Appearance of an identity in every image: a common outfit and details of its own.

    `pattern_height` is in body units; the bag is on the side where x has the sign of
    `bag_side`; `build` widens the body.
    """

    shirt: Colour
    trousers: Colour
    skin: Colour
    hair: Colour
    long_hair: bool
    hat: Colour | None
    scarf: Colour | None
    long_sleeves: bool
    legwear: str
    side_stripe: Colour | None
    pattern: str
    pattern_colour: Colour
    pattern_height: float
    bag: str
    bag_colour: Colour
    bag_side: int
    shoes: Colour
    build: float

    @classmethod
    def of(cls, identity: int, *, seed: int) -> Self:
        """Return the appearance of an identity in the data set with this seed."""
        return cls.sample(np.random.default_rng((seed, _APPEARANCE, identity)))

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Return a random appearance."""
        shirt, trousers = _pick(rng, SHIRTS), _pick(rng, TROUSERS)
        return cls(
            shirt=shirt,
            trousers=trousers,
            skin=_pick(rng, SKINS),
            hair=_pick(rng, HAIRS),
            long_hair=rng.random() < 0.4,
            hat=_pick(rng, ACCENTS) if rng.random() < 0.3 else None,
            scarf=_accent(rng, shirt) if rng.random() < 0.25 else None,
            long_sleeves=rng.random() < 0.65,
            legwear=_pick(rng, ("trousers", "trousers", "trousers", "shorts", "skirt")),
            side_stripe=_accent(rng, trousers) if rng.random() < 0.3 else None,
            pattern=_pick(rng, ("plain", "band", "bands", "column", "square", "disc")),
            pattern_colour=_accent(rng, shirt),
            pattern_height=rng.uniform(0.24, 0.34),
            bag=_pick(rng, ("none", "satchel", "backpack", "handbag")),
            bag_colour=_accent(rng, shirt),
            bag_side=_pick(rng, (-1, 1)),
            shoes=_pick(rng, SHOES),
            build=rng.uniform(1.05, 1.25),
        )


@dataclass(frozen=True, slots=True)
class Camera:
    """Properties that all images of one camera share: light, lens and place.

    Attributes:
        gain: Factors on red, green and blue: light and colour cast in one.
        gamma: Exponent of the tone curve.
        saturation: Strength of colours; 0 is gray, 1 leaves them alone.
        sharpness: Resolution of the lens as a share of the image's.
        noise: Greatest change of a pixel by noise, in levels of 255.
        path: Direction in which people walk, in radians; 0 is towards the camera.
        wall: Colour above the horizon.
        floor: Colour below the horizon.
        horizon: Height at which the floor begins, as a share of the image's height.
        has_bars: Whether vertical lines structure the wall.
        has_boards: Whether horizontal lines structure the wall.
        spacing: Distance of these lines, as a share of the image's width.
    """

    gain: tuple[float, float, float]
    gamma: float
    saturation: float
    sharpness: float
    noise: float
    path: float
    wall: Colour
    floor: Colour
    horizon: float
    has_bars: bool
    has_boards: bool
    spacing: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Self:
        """Return a random camera."""
        red, green, blue = rng.uniform(0.88, 1.1) * rng.uniform(0.965, 1.035, 3)
        return cls(
            gain=(red, green, blue),
            gamma=rng.uniform(0.88, 1.12),
            saturation=rng.uniform(0.8, 1.05),
            sharpness=rng.uniform(0.6, 1.0),
            noise=rng.uniform(3.0, 10.0),
            path=rng.uniform(-0.9, 0.9),
            wall=_dull_colour(rng),
            floor=_dull_colour(rng),
            horizon=rng.uniform(0.35, 0.8),
            has_bars=rng.random() < 0.5,
            has_boards=rng.random() < 0.5,
            spacing=rng.uniform(0.2, 0.5),
        )


@dataclass(frozen=True, slots=True)
class Pose:
    """Pose of a person in the box that a detector has cut out.

    Attributes:
        yaw: Direction in which the person looks, in radians; 0 is into the camera, pi is away.
        stride: Angle of the legs to the vertical, in radians; negative swaps the legs.
        swing: Angle of the arms to the vertical, in radians.
        lean: Sideways shift of the crown, in body units.
        scale: Height of the body, as a share of the image's height.
        soles: Position of the soles, as shares of the image's width and height.
    """

    yaw: float
    stride: float
    swing: float
    lean: float
    scale: float
    soles: XY

    @classmethod
    def sample(cls, rng: np.random.Generator, path: float) -> Self:
        """Return the pose of a random walker on a path, in one of its two directions."""
        phase = math.sin(rng.uniform(-math.pi, math.pi))
        scale = rng.uniform(0.84, 1.04)
        return cls(
            yaw=path + math.pi * rng.integers(2) + rng.normal(0.0, 0.35),
            stride=rng.uniform(0.1, 0.45) * phase,
            swing=rng.uniform(-0.5, -0.1) * phase,
            lean=rng.normal(0.0, 0.02),
            scale=scale,
            soles=(rng.normal(0.5, 0.05), 0.5 + scale / 2 + rng.normal(0.0, 0.025)),
        )


def render(
    who: Appearance, camera: Camera, rng: np.random.Generator, *, height: int, width: int
) -> NDArray[np.uint8]:
    """Draw a person in front of a camera; pose, box, clutter and noise come from `rng`."""
    pose = Pose.sample(rng, camera.path)
    canvas = _background(camera, rng, SUPERSAMPLING * height, SUPERSAMPLING * width)
    _draw_person(canvas, who, pose)
    _occlude(canvas, camera, rng)
    return _develop(canvas, camera, rng, height, width)


class _Figure:
    """Parts of a body, which are painted from far to near.

    Parts are flat shapes in the image's plane, in body units. Their `depth` grows towards the
    camera; parts of equal depth cover each other in the order in which they were added.
    """

    def __init__(self, pose: Pose, build: float) -> None:
        self._pose, self._build = pose, build
        self._cos, self._sin = math.cos(pose.yaw), math.sin(pose.yaw)
        self._parts: list[tuple[float, bool, Sequence[XY], Colour]] = []

    def turn(self, x: float, z: float) -> Pair:
        """Return where the camera sees a place of the body: offset to the right, and depth."""
        x *= self._build
        return x * self._cos + z * self._sin, z * self._cos - x * self._sin

    def joints(self, x: float, y: float, lengths: Pair, angles: Pair) -> list[tuple[XY, float]]:
        """Return where an arm or leg that hangs at (x, y) begins, bends and ends, with depths.

        The angles of its two parts are to the vertical, in radians; positive is forwards.
        """
        z, places = 0.0, []
        for length, angle in zip((0.0, *lengths), (0.0, *angles), strict=True):
            z, y = z + length * math.sin(angle), y + length * math.cos(angle)
            right, depth = self.turn(x, z)
            places.append(((right, y), depth))
        return places

    def breadth(self, half_width: float, flatness: float) -> float:
        """Return half the visible width of a part `flatness` times as deep as it is wide."""
        return self._build * half_width * math.hypot(self._cos, flatness * self._sin)

    def girth(self, y: float) -> float:
        """Return half the visible width of the trunk at a height."""
        return self.breadth(0.12 - 0.045 * y, 0.6)

    def ellipse(self, centre: XY, radii: Pair, colour: Colour, depth: float) -> None:
        """Add an upright ellipse."""
        (x, y), (rx, ry) = centre, radii
        self._parts.append((depth, True, ((x - rx, y - ry), (x + rx, y + ry)), colour))

    def limb(self, a: XY, b: XY, radii: Pair, colour: Colour, depth: float) -> None:
        """Add a tapered stroke with round ends."""
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = math.hypot(dx, dy)
        rims = ((a, radii[0]), (b, radii[1]), (b, -radii[1]), (a, -radii[0]))
        outline = [(x - r * dy / length, y + r * dx / length) for (x, y), r in rims]
        self._parts.append((depth, False, outline, colour))
        for end, radius in zip((a, b), radii, strict=True):
            self.ellipse(end, (radius, radius), colour, depth)

    def block(self, x: float, halves: Pair, ys: Pair, colour: Colour, depth: float) -> None:
        """Add a trapezoid: half its widths, and its heights, above and below."""
        (above, below), (top, bottom) = halves, ys
        outline = ((x - above, top), (x + above, top), (x + below, bottom), (x - below, bottom))
        self._parts.append((depth, False, outline, colour))

    def belt(self, top: float, bottom: float, colour: Colour) -> None:
        """Add a ring around the trunk."""
        self.block(0.0, (self.girth(top), self.girth(bottom)), (top, bottom), colour, 0.0)

    def patch(self, bearing: float, outline: Sequence[XY], colour: Colour) -> None:
        """Add a patch on the trunk, as far as it is on the side that the camera sees.

        Args:
            bearing: Direction on the trunk, in radians; 0 is the chest, pi is the back.
            outline: Corners of the patch: radians from `bearing`, and heights.
            colour: Colour of the patch.
        """
        limit = math.pi / 2
        centre = math.remainder(bearing + self._pose.yaw, math.tau)
        seen = [(min(max(centre + angle, -limit), limit), y) for angle, y in outline]
        if any(abs(angle) < limit for angle, _ in seen):
            corners = [(self.girth(y) * math.sin(angle), y) for angle, y in seen]
            self._parts.append((0.0, False, corners, colour))

    def paint(self, canvas: Image.Image) -> None:
        """Paint all parts at the places that the pose gives them in an image."""
        pen = ImageDraw.Draw(canvas)
        unit = self._pose.scale * min(canvas.height, 2 * canvas.width)
        left = self._pose.soles[0] * canvas.width
        top = self._pose.soles[1] * canvas.height - unit
        lean = self._pose.lean
        for depth, is_ellipse, points, colour in sorted(self._parts, key=lambda part: part[0]):
            placed = [(left + unit * (x + lean * (1 - y)), top + unit * y) for x, y in points]
            shape = pen.ellipse if is_ellipse else pen.polygon
            shape(placed, fill=_shade(colour, min(max(1.0 + 1.5 * depth, 0.75), 1.1)))


def _draw_person(canvas: Image.Image, who: Appearance, pose: Pose) -> None:
    figure = _Figure(pose, who.build)
    _draw_trunk(figure, who)
    _draw_legs(figure, who, pose.stride)
    _draw_arms(figure, who, pose.swing)
    _draw_head(figure, who)
    _draw_worn_bag(figure, who)
    figure.paint(canvas)


def _draw_trunk(figure: _Figure, who: Appearance) -> None:
    shoulder = figure.girth(0.19) - 0.035
    figure.limb((-shoulder, 0.19), (shoulder, 0.19), (0.035, 0.035), who.shirt, 0.0)
    figure.belt(0.18, 0.48, who.shirt)
    at, colour = who.pattern_height, who.pattern_colour
    if who.pattern == "band":
        figure.belt(at - 0.03, at + 0.03, colour)
    elif who.pattern == "bands":
        for top in (at - 0.065, at - 0.005, at + 0.055):
            figure.belt(top, top + 0.025, colour)
    # What is printed on the chest is printed on the back, so that it shows in most poses.
    for bearing in (0.0, math.pi):
        if who.pattern == "column":
            figure.patch(bearing, _rectangle(0.3, 0.16, 0.48), colour)
        elif who.pattern == "square":
            figure.patch(bearing, _rectangle(0.45, at - 0.045, at + 0.045), colour)
        elif who.pattern == "disc":
            turns = [math.tau * step / 10 for step in range(10)]
            disc = [(0.5 * math.cos(turn), at + 0.05 * math.sin(turn)) for turn in turns]
            figure.patch(bearing, disc, colour)
    if who.scarf:
        neck = figure.breadth(0.05, 0.9)
        figure.limb((-neck, 0.165), (neck, 0.165), (0.028, 0.028), who.scarf, 0.0)
        for bearing in (0.35, math.pi + 0.35):
            figure.patch(bearing, _rectangle(0.2, 0.17, 0.32), who.scarf)


def _draw_legs(figure: _Figure, who: Appearance, stride: float) -> None:
    waist = figure.girth(0.48)
    figure.block(0.0, (waist, waist), (0.45, 0.53), who.trousers, -0.01)
    if who.legwear == "skirt":
        figure.block(0.0, (waist, 1.25 * waist), (0.46, 0.68), who.trousers, -0.01)
    thigh_colour = who.skin if who.legwear == "skirt" else who.trousers
    shin_colour = who.trousers if who.legwear == "trousers" else who.skin
    for side in (-1, 1):
        angle = side * stride
        # Only the knee of the leg behind is bent.
        bends = (angle, angle + 0.5 * min(angle, 0.0))
        joints = figure.joints(side * 0.053, 0.52, (0.23, 0.21), bends)
        (hip, _), (knee, near), (ankle, _) = joints
        # Legs stay behind what hangs over them.
        depth = min(0.5 * near, 0.0) - 0.02
        heel = (ankle[0], ankle[1] + 0.02)
        toe = (ankle[0] + figure.turn(side * 0.01, 0.07)[0], ankle[1] + 0.03)
        figure.limb(heel, toe, (0.026, 0.022), who.shoes, depth)
        figure.limb(knee, ankle, (0.042, 0.03), shin_colour, depth)
        figure.limb(hip, knee, (0.056, 0.044), thigh_colour, depth)
        seam, seam_near = figure.turn(side * 0.036, 0.0)
        if who.side_stripe and who.legwear != "skirt" and seam_near > -0.03:
            top, middle = (hip[0] + seam, hip[1]), (knee[0] + 0.8 * seam, knee[1])
            figure.limb(top, middle, (0.012, 0.012), who.side_stripe, depth)
            if who.legwear == "trousers":
                end = (ankle[0] + 0.5 * seam, ankle[1])
                figure.limb(middle, end, (0.012, 0.012), who.side_stripe, depth)


def _draw_arms(figure: _Figure, who: Appearance, swing: float) -> None:
    sleeve = who.shirt if who.long_sleeves else who.skin
    for side in (-1, 1):
        bends = (side * swing, side * swing + 0.3)
        joints = figure.joints(side * 0.118, 0.2, (0.15, 0.14), bends)
        (shoulder, _), (elbow, depth), (wrist, _) = joints
        figure.limb(elbow, wrist, (0.028, 0.022), sleeve, depth)
        figure.limb(shoulder, elbow, (0.036, 0.031), who.shirt, depth)
        x, y = wrist
        figure.ellipse((x, y + 0.02), (0.02, 0.026), who.skin, depth)
        if who.bag == "handbag" and side == who.bag_side:
            half, top = figure.breadth(0.032, 2.0), y + 0.07
            for fixed in ((x - half / 2, top), (x + half / 2, top)):
                figure.limb((x, y + 0.02), fixed, (0.006, 0.006), who.bag_colour, depth)
            figure.block(x, (half, half + 0.01), (top, top + 0.09), who.bag_colour, depth)


def _draw_head(figure: _Figure, who: Appearance) -> None:
    face_x, face_near = figure.turn(0.0, 0.05)
    figure.limb((0.0, 0.12), (0.0, 0.17), (0.032, 0.036), who.skin, 0.0)
    if who.long_hair:
        figure.ellipse((-0.4 * face_x, 0.11), (0.066, 0.09), who.hair, -face_near)
    figure.ellipse((0.0, 0.068), (0.057, 0.068), who.hair, 0.06)
    if face_near > -0.03:
        figure.ellipse((0.5 * face_x, 0.084), (0.043, 0.056), who.skin, 0.06)
    if who.hat:
        figure.ellipse((0.0, 0.035), (0.062, 0.042), who.hat, 0.06)
        left, right = (face_x - 0.045, 0.055), (face_x + 0.045, 0.055)
        figure.limb(left, right, (0.01, 0.01), who.hat, 0.06)


def _draw_worn_bag(figure: _Figure, who: Appearance) -> None:
    side, colour = who.bag_side, who.bag_colour
    if who.bag == "backpack":
        x, depth = figure.turn(0.0, -0.12)
        half = figure.breadth(0.085, 0.65)
        figure.ellipse((x, 0.22), (half, 0.05), colour, depth)
        figure.block(x, (half, half + 0.012), (0.22, 0.38), colour, depth)
        figure.ellipse((x, 0.38), (half + 0.012, 0.04), colour, depth)
        for bearing in (-0.62, 0.62):
            figure.patch(bearing, _rectangle(0.17, 0.16, 0.36), colour)
    elif who.bag == "satchel":
        strap = ((-0.7, 0.16), (-0.4, 0.16), (1.4, 0.45), (1.4, 0.49))
        for bearing, way in ((0.0, side), (math.pi, -side)):
            figure.patch(bearing, [(way * angle, y) for angle, y in strap], colour)
        x, depth = figure.turn(side * 0.12, 0.0)
        half = figure.breadth(0.032, 2.0)
        figure.block(x, (half, half), (0.44, 0.55), colour, depth + 0.03)


def _rectangle(half_angle: float, top: float, bottom: float) -> tuple[XY, ...]:
    """Return the outline of an upright patch on the trunk."""
    left, right = -half_angle, half_angle
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _background(
    camera: Camera, rng: np.random.Generator, height: int, width: int
) -> Image.Image:
    """Draw the part of the camera's view that is behind the person."""
    rows, columns = 12, 6
    horizon = camera.horizon + rng.normal(0.0, 0.05)
    usual, here = (camera.wall, camera.floor), (_dull_colour(rng), _dull_colour(rng))
    grounds = 0.3 * np.array(usual) + 0.7 * np.array(here)
    coarse = grounds[(np.arange(rows) > horizon * rows).astype(int), None]
    coarse = np.clip(coarse * rng.uniform(0.75, 1.25, (rows, columns, 1)), 0, 255)
    canvas = Image.fromarray(coarse.astype(np.uint8)).resize((width, height), _SMOOTH)
    pen = ImageDraw.Draw(canvas)
    bottom, step = horizon * height, camera.spacing * width
    ink, thickness = _shade(here[0], rng.uniform(0.5, 0.8)), max(1, round(0.2 * step))
    start = rng.uniform(0.0, step)
    if camera.has_bars:
        for x in np.arange(start, width, step).tolist():
            pen.line((x, 0.0, x, bottom), fill=ink, width=thickness)
    if camera.has_boards:
        for y in np.arange(start, bottom, step).tolist():
            pen.line((0.0, y, width, y), fill=ink, width=thickness)
    for _ in range(rng.integers(3)):
        x, y = rng.uniform((-0.3, 0.0), (1.0, 0.8)) * (width, height)
        across, down = rng.uniform((0.15, 0.2), (0.5, 0.8)) * width
        pen.rectangle((x, y, x + across, y + down), fill=_dull_colour(rng))
    return canvas


def _occlude(canvas: Image.Image, camera: Camera, rng: np.random.Generator) -> None:
    """Draw a pole, a bench or a passer-by before the person in a quarter of the images."""
    width, height = canvas.size
    pen = ImageDraw.Draw(canvas)
    chance = rng.random()
    if chance < 0.08:
        x, half = rng.uniform((0.1, 0.03), (0.9, 0.07)) * width
        pen.rectangle((x - half, 0, x + half, height), fill=_dull_colour(rng))
    elif chance < 0.16:
        top = rng.uniform(0.66, 0.88) * height
        colour = _dull_colour(rng)
        pen.rectangle((0, top, width, top + 0.04 * height), fill=colour)
        pen.rectangle((0, top + 0.07 * height, width, height), fill=_shade(colour, 0.7))
    elif chance < 0.24:
        pose = Pose.sample(rng, camera.path)
        beside = (pose.soles[0] + _pick(rng, (-0.48, 0.48)), pose.soles[1] + 0.1)
        _draw_person(canvas, Appearance.sample(rng), replace(pose, scale=1.1, soles=beside))


def _develop(
    canvas: Image.Image, camera: Camera, rng: np.random.Generator, height: int, width: int
) -> NDArray[np.uint8]:
    """Return the image that the camera records of the drawn scene."""
    lens = round(camera.sharpness * width), round(camera.sharpness * height)
    soft = canvas.resize(lens, Image.Resampling.BOX).resize((width, height), _SMOOTH)
    levels = rng.uniform(0.93, 1.07) * np.outer(camera.gain, np.arange(256) / 255)
    curves = 255 * np.minimum(levels, 1) ** camera.gamma
    pixels = np.asarray(soft.point(curves.astype(int).ravel().tolist()), np.float32)
    gray = pixels.mean(axis=2, keepdims=True)
    shadows = Image.fromarray(rng.uniform(0.8, 1.2, (8, 4)).astype(np.float32))
    light = np.asarray(shadows.resize((width, height), _SMOOTH))[:, :, None]
    grain = np.frombuffer(rng.bytes(pixels.size), np.uint8).reshape(pixels.shape)
    noise = np.float32(camera.noise) * (grain / np.float32(127.5) - 1)
    recorded = light * (gray + np.float32(camera.saturation) * (pixels - gray)) + noise
    image: NDArray[np.uint8] = np.clip(recorded, 0, 255).astype(np.uint8)
    return image


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _accent(rng: np.random.Generator, against: Colour) -> Colour:
    """Return a random colour of details that stands out against another colour."""
    return _pick(rng, [colour for colour in ACCENTS if math.dist(colour, against) > 110.0])


def _dull_colour(rng: np.random.Generator) -> Colour:
    """Return a random colour without much hue, as most things in a street have."""
    red, green, blue = rng.uniform(70.0, 180.0) + rng.uniform(-12.0, 12.0, 3)
    return int(red), int(green), int(blue)


def _shade(colour: Colour, light: float) -> Colour:
    red, green, blue = (min(int(light * level), 255) for level in colour)
    return red, green, blue
