from common.coco.class_names import spelled_as


def test_an_underscore_counts_as_a_space_in_both_directions():
    assert spelled_as(["traffic_light", "dog"], ["dog", "traffic light"]) == (
        "traffic light",
        "dog",
    )
    assert spelled_as(["my class"], ["my_class"]) == ("my_class",)


def test_the_same_name_comes_first():
    names = ("hot_dog", "hot dog")
    assert spelled_as(names, ["hot dog", "hot_dog"]) == names
    assert spelled_as(["hot_dog"], ["hot_dog", "hot dog"]) == ("hot_dog",)


def test_what_is_unknown_or_ambiguous_stays():
    assert spelled_as(["a_b_c"], ["a_b c", "a b_c"]) == ("a_b_c",)
    assert spelled_as(["cat"], ["dog"]) == ("cat",)
