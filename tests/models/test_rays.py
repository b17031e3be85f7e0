"""Cameras: poses of latent frames, keys, and rays as channels, each by hand."""

import math

import numpy as np
import pytest
import torch
from oracles import pose, walk

from inferix.errors import UsageError
from inferix.models.rays import folded, pixel_rays, ray_channels
from inferix.schemes.camera import (
    Camera,
    CameraMove,
    CameraSpeeds,
    CameraTrack,
    look_up,
    pitch_of,
    resampled,
    steps_between,
    turn_right,
)

INTRINSICS = (20.0, 30.0, 16.0, 8.0)


def begin(camera, size=(32, 16), block=4):
    return CameraTrack.begin(camera, size, (832, 480), 4, 16, block)


def rays_of(poses, **settings):
    """Channels [F, 6, h, w] of the pixels of poses of latent frames, unfolded."""
    track = begin(Camera(poses=np.array(poses), rate="latent", intrinsics=INTRINSICS, size=(32, 16), **settings))
    motions = torch.from_numpy(track.motions(range(len(poses))))
    return ray_channels(motions, track.intrinsics, (16, 32), 1)


def test_rays_of_a_camera_at_rest():
    channels = rays_of([np.eye(4)] * 3)
    assert not channels[:, :3].any()
    assert torch.allclose(channels[:, 3:].norm(dim=1), torch.ones(3, 16, 32, dtype=torch.float64))
    i, j = 5, 7
    ray = np.array([(i + 0.5 - 16) / 20, (j + 0.5 - 8) / 30, 1])
    assert channels[1, 3:, j, i].tolist() == pytest.approx(ray / np.linalg.norm(ray), abs=1e-12)


def test_the_ray_of_the_centre_turns_with_the_camera():
    """Yaw right moves forward towards +x, looking up towards -y; a centre between pixels, so cx and cy at one."""
    intrinsics = (20.0, 20.0, 16.5, 8.5)
    for rotation, want in (
        (turn_right(30), (math.sin(math.pi / 6), 0, math.cos(math.pi / 6))),
        (look_up(30), (0, -math.sin(math.pi / 6), math.cos(math.pi / 6))),
    ):
        motions = torch.from_numpy(steps_between(np.array([pose(), pose(rotation)])))
        assert ray_channels(motions, intrinsics, (16, 32), 1)[1, 3:, 8, 16].tolist() == pytest.approx(want, abs=1e-12)


def test_translations_are_divided_by_the_longest_step_of_the_path():
    channels = rays_of([pose(translation=(0, 0, z)) for z in (5, 5.5, 7.5)])
    assert channels[:, :3, 0, 0].tolist() == [[0, 0, 0], [0, 0, 0.25], [0, 0, 1]]


def test_motions_are_relative_to_the_frame_before():
    """In the axes of that frame: after a right turn by 90 degrees, a step along the world's x is one forward."""
    poses = np.array([pose(), pose(turn_right(90)), pose(turn_right(90), (2, 0, 0))])
    track = begin(Camera(poses=poses, rate="latent"))
    assert track.motions(range(3))[2].round(12).tolist() == pose(translation=(0, 0, 1)).tolist()


def test_order_of_folded_channels():
    pixels = torch.zeros(1, 6, 16, 32)
    j, i = 11, 21
    pixels[0, 3, j, i] = 1
    channels = folded(pixels, 8)
    assert channels.shape == (1, 384, 2, 4)
    assert channels.nonzero().tolist() == [[0, 64 * 3 + 8 * (j % 8) + i % 8, j // 8, i // 8]]


def test_intrinsics_are_scaled_to_the_picture():
    track = begin(Camera(intrinsics=(400.0, 600.0, 416.0, 240.0)), size=(208, 240))
    assert track.intrinsics == (100.0, 300.0, 104.0, 120.0)
    rays = pixel_rays(track.intrinsics, (240, 208), torch.float64)
    want = np.array([0.005, 0.5 / 300, 1])
    assert rays[120, 104].tolist() == pytest.approx(want / np.linalg.norm(want), abs=1e-12)


def test_a_path_is_stretched_over_whole_blocks():
    """361 pictures are 91 latent frames, 88 in blocks of 4; the place of frame f is 360 f / 87."""
    poses = np.array([pose(turn_right(0.25 * index), (index, 0, 0)) for index in range(363)])
    frames = Camera(poses=poses).frames(4, 4)
    assert len(frames) == 88
    places = [360 * frame / 87 for frame in range(88)]
    assert frames[:, 0, 3].tolist() == pytest.approx(places, abs=1e-9)
    yaws = [math.degrees(math.atan2(frame[0, 2], frame[2, 2])) for frame in frames]
    assert yaws == pytest.approx([0.25 * place for place in places], abs=1e-9)


def test_rotations_are_interpolated_the_shorter_way():
    for angle in (100, 179, -170):
        middle = resampled(np.array([pose(), pose(turn_right(angle))]), 3)[1]
        assert np.allclose(middle[:3, :3], turn_right(angle / 2), atol=1e-9)
    assert np.allclose(resampled(np.array([pose(turn_right(20))]), 4), pose(turn_right(20)))


def test_a_path_at_once_equals_the_same_path_block_by_block():
    poses = walk(12)
    whole = begin(Camera(poses=poses, rate="latent"))
    track = begin(Camera(poses=poses[:4], rate="latent", scale=whole.scale))
    for start in (0, 4, 8):
        if start:
            track.follow(start, poses[start : start + 4])
        frames = range(start, start + 4)
        assert np.array_equal(track.motions(frames), whole.motions(frames))
        track.forget(start + 4)
    assert len(track.poses) == 1 and np.array_equal(track.motions(range(12, 14))[:, :3, 3], np.zeros((2, 3)))


def test_each_block_by_its_own_longest_step():
    track = begin(Camera(poses=walk(8), rate="latent", normalize="block"))
    for frames in (range(4), range(4, 8)):
        assert np.linalg.norm(track.motions(frames)[:, :3, 3], axis=1).max() == pytest.approx(1)


def test_keys_move_and_turn_at_their_speeds():
    """A quarter of a second for a latent frame: 0.2 units and 8 degrees; a step at full speed has length 1."""
    track = begin(Camera())
    track.hold(4, CameraMove(forward=1, yaw=1, pitch=1), 4)
    motions = track.motions(range(8))
    assert np.array_equal(motions[:4], np.tile(np.eye(4), (4, 1, 1)))
    assert np.linalg.norm(motions[4:, :3, 3], axis=1).tolist() == pytest.approx([1] * 4)
    assert pitch_of(track.poses[-1][:3, :3]) == pytest.approx(32)
    heading = track.poses[-1][:3, 2]
    assert math.degrees(math.atan2(heading[0], heading[2])) == pytest.approx(32)
    assert track.poses[-1][1, 3] == 0  # on the horizontal plane, wherever it looks


def test_looking_up_ends_at_the_limit_and_a_mouse_turns_over_one_block():
    track = begin(Camera(speeds=CameraSpeeds(turn=200, pitch_limit=60)))
    track.hold(0, CameraMove(pitch=1), 4)
    track.reach(20)
    assert pitch_of(track.poses[-1][:3, :3]) == pytest.approx(60)
    track.hold(20, CameraMove(turn=(10, -20)), 4)
    track.hold(20, CameraMove(turn=(10, -20)), 4)  # before the next block: they add up
    track.reach(40)
    assert pitch_of(track.poses[-1][:3, :3]) == pytest.approx(20)
    assert np.allclose(track.poses[23 - track.first], track.poses[-1])


def test_keys_pressed_and_released_between_two_blocks_are_held_for_one():
    track = begin(Camera())
    track.reach(4)
    for move in (CameraMove(forward=1, yaw=1), CameraMove(forward=-1), CameraMove(turn=(4, 0)), CameraMove()):
        track.hold(4, move, 4)
    twin = track.fork()
    track.hold(4, CameraMove(right=1), 4)
    for moved, right in ((twin, 0), (track, 1)):
        moved.reach(16)
        poses = np.array(moved.poses)
        headings = np.degrees(np.arctan2(poses[:, 0, 2], poses[:, 2, 2]))
        assert np.allclose(np.diff(headings)[3:7], 9) and np.allclose(np.diff(headings)[7:], 0)
        assert (np.linalg.norm(np.diff(poses[3:8, :3, 3], axis=0), axis=1) > 0.19).all()
        assert np.allclose(moved.motions(range(8, 12))[:, :3, 3], [right, 0, 0])


def test_a_fork_has_keys_of_its_own():
    track = begin(Camera())
    track.hold(0, CameraMove(forward=1), 4)
    twin = track.fork()
    twin.hold(4, CameraMove(yaw=-1), 4)
    assert np.allclose(track.motions(range(8))[4:], np.tile(pose(translation=(0, 0, 1)), (4, 1, 1)))
    assert not np.array_equal(twin.motions(range(8))[4:], track.motions(range(4, 8)))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"poses": np.zeros((3, 4, 4))}, r"poses\[0\]"),
        ({"poses": np.diag([1.0, 1, -1, 1])[None]}, r"poses\[0\]"),
        ({"poses": np.full((2, 4, 4), np.nan)}, r"poses\[0\]"),
        ({"poses": np.eye(3)[None]}, r"\[1, 3, 3\]"),
        ({"poses": [["a"]]}, "poses"),
        ({"poses": [[1.0], [1.0, 2.0]]}, "poses"),
        ({"intrinsics": (0.0, 1.0, 2.0, 3.0)}, "intrinsics"),
        ({"intrinsics": (1.0, 1.0, 2.0)}, "intrinsics"),
        ({"intrinsics": (1.0, 1.0, math.inf, 0.0)}, "intrinsics"),
        ({"scale": 0.0}, "scale"),
        ({"scale": math.nan}, "scale"),
        ({"rate": "hour"}, "hour"),
        ({"normalize": "none"}, "none"),
        ({"size": (0, 4)}, "size"),
    ],
)
def test_bad_cameras(settings, named):
    with pytest.raises(UsageError, match=named):
        Camera(**settings)


def test_too_few_poses_for_a_block():
    with pytest.raises(UsageError, match="13"):
        begin(Camera(poses=np.tile(np.eye(4), (12, 1, 1))))
    assert len(begin(Camera(poses=np.tile(np.eye(4), (13, 1, 1)))).poses) == 4


@pytest.mark.parametrize("values", [{"forward": 2}, {"yaw": math.nan}, {"turn": (1, 2, 3)}, {"turn": (1e9, 0)}])
def test_bad_moves(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        CameraMove(**values)
    with pytest.raises(UsageError, match="move"):
        CameraSpeeds(move=-1)
