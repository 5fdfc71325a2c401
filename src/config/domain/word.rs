//! Enumerations whose values are words in XML.

/// An enumeration whose values are words in XML.
pub trait Word: Sized + Copy + 'static {
    /// Every word, in the order in which they are listed to people.
    fn words() -> Vec<&'static str>;
    /// The value of a word.
    fn from_word(word: &str) -> Option<Self>;
    /// The word of a value.
    fn word(self) -> &'static str;
}

/// Declares an enumeration with a word for each value.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $value:ident = $word:literal,)+ }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum $name {
            $(
                #[doc = concat!("`", $word, "`")]
                $(#[$doc])*
                $value,
            )+
        }

        impl $crate::config::domain::word::Word for $name {
            fn words() -> Vec<&'static str> {
                vec![$($word),+]
            }

            fn from_word(word: &str) -> Option<Self> {
                match word {
                    $($word => Some($name::$value),)+
                    _ => None,
                }
            }

            fn word(self) -> &'static str {
                match self {
                    $($name::$value => $word,)+
                }
            }
        }
    };
}

pub(super) use words;
